"""Locust's web page against a running server: `locust -f locustfile.py -H http://127.0.0.1:8000`."""

from manyheads.bench.web import ChatUser

__all__ = ["ChatUser"]
