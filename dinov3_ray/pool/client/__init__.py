"""A client's side of a pool: RemoteTeacher, and the router that spreads its requests over the replicas."""
