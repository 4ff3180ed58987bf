"""Makes the embedded Desk policy: `python -m hintsd_jax.warmup --config=configs/desk_warmup.py --out=assets/desk-policy`."""
