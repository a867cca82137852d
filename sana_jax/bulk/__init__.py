"""Many images in one go: requests, a plan, files that survive any ending."""
