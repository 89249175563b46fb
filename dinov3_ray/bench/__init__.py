"""Measurements that anyone can repeat: this project and its peers do the same work in the same run.

NOTES.md records what was tried and what it gave, failures included.
"""
