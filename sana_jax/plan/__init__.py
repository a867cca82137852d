"""What a run needs, before any of the hardware is rented."""
