"""Episodes: tasks in, finished append-only token streams out."""
