"""OpenAI's HTTP API over the models of a server: what requests hold, what answers look like, and the routes."""
