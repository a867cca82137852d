"""A pipeline that several people use at once: a queue, a page, an endpoint."""
