"""Batteries: many seeded cases of one kind of misfortune, each of which must end well. `battery` says what that is."""
