"""Measurements that anyone can repeat: this project, its peers on the same work in the same run, and the bound."""
