"""Load tests of any server with OpenAI's interface: `manyheads bench`. Needs the extra `bench` (Locust, matplotlib).

The load comes from Locust in a process of its own (`generator.py`), for gevent changes the standard library there; the
command's process prepares requests, watches the server, and makes the report.
"""
