"""What this machine gives: CPUs, locks on files, a folder for sockets. Needs neither torch nor Ray."""
