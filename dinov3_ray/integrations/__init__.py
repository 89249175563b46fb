"""Other libraries' trainers, and a loader for any of them, with targets from a teacher."""
