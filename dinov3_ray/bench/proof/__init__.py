"""The proof that distilling helps: students with the same few labels, with and without a teacher that knows something.

NOTES.md, in the folder above, says how its settings were found.
"""
