"""How the embedded Desk policy was made."""
