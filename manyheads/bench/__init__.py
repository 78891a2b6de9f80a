"""`manyheads bench` tests servers with OpenAI's interface under load. It needs the extra `bench` (Locust, matplotlib).

The load comes from Locust in a process of its own (`generator.py`), for gevent changes the standard library there; the
command's process prepares requests, watches the server, and makes the report.
"""
