"""What a run holds on each device, from shapes alone; see `hintsd_jax.plan`."""
