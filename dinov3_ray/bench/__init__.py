"""Measurements that anyone can repeat: this project, its peers on the same work in the same run, and the bound.

NOTES.md keeps what was tried, and what failed.
"""
