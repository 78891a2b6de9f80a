"""Training of Medusa heads on any supported base. Nothing that serves imports this."""
