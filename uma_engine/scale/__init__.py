"""Several engines behind one address, on Ray Serve (extra `ray`): see `cluster.Cluster`.

An entry process holds the connections, as a front end of `uma serve` does, and asks the engine that knows the most of a request.
"""

from __future__ import annotations

from uma_engine.scale.routing import Route, preferred, route_of

__all__ = ["Route", "preferred", "route_of"]
