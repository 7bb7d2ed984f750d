"""How operators talk to a running centre: ``Status``, ``WatchRounds`` and ``Stop`` over gRPC, see ``operator.proto``.

``service`` answers, ``server`` lets in, ``client`` asks, ``view`` shows. ``operator_pb2*`` are made by ``make proto``.
"""
