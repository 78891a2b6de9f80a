"""A discrete-event simulation of many replicas: what routing, autoscaling and failures do to latency and cost."""
