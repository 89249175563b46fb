"""A pool: replicas of a teacher behind one name, as Ray actors or as threads of this process.

The folder, from what users hold down to what everything stands on::

    rollout.py        make a running pool what its file says
    teacher_pool.py   TeacherPool: start, connect, scale, reload, shut down
    local.py          the same pool in one process, without Ray
    poolfile.py       pool.yaml: its keys, its JSON schema, the difference between two pools
    client/           RemoteTeacher: requests are cut, routed, sent again and rejoined
    control/          the controller: starts, watches, replaces and scales replicas
    replica/          a replica: queues requests, forms batches, runs the teacher
    transport/        how a request crosses: Ray calls, or a call in this process; tensors as NumPy arrays
    messages.py       what client, replica and controller send each other
    metrics.py        Prometheus samples, through Ray's metrics
    kv.py             facts about a pool that outlive its processes, in Ray's key-value store
    shared_ray.py     one Ray for the ranks that a launcher starts on a node
    cluster.py        connect to Ray, and notice that it was left; names of a pool's actors
    address.py        where pools are found: the address of a Ray's head, and a namespace in that Ray
    probe.py          why a Ray cannot be joined: unreachable, token, TLS
    spec.py           PoolSpec, and the options of a pool

The life of a request:

1. ``client/remote`` checks the images, and ``client/request`` **cuts** the batch into parts of at most ``max_batch``
   images.
2. ``client/router``, a thread that owns all state of the client, asks ``client/routing_table`` what to send next;
   ``client/balancer`` **chooses a replica** by what is in flight there.
3. ``transport`` sends the part. A header and NumPy arrays **cross**, never tensors; large arrays go through Ray's
   object store.
4. ``replica/actor`` receives it, and ``replica/queue`` **batches** it with others if the pool's ``batching`` says so.
5. ``replica/device_pipeline`` **computes** it on the replica's one device thread: copy in, forward pass, copy out.
6. The answer returns to the router. A part whose replica died, hung, refused it or raised is sent to another one.
7. When all parts are there, and from one teacher, ``client/request`` **rejoins** them in order.

The controller takes no part in this. It sends each client the list of replicas (``PoolView``), and if it dies,
requests go on.
"""
