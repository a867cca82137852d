"""Commands about checkpoints: what one is, another layout, where it differs."""
