"""The pool: teacher replicas behind a router, as Ray actors or as threads of this process.

From the ground up: ``messages``, ``options``, ``wire`` (what crosses, and how), ``routing``, ``batching``,
``membership`` (pure decisions), ``replica``, ``controller`` (what runs in actors), ``router``, ``transport``,
``local`` (what runs
in the client), ``remote``, ``teacher_pool`` (what users hold).
"""
