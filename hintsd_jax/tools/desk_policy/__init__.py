"""Makes the embedded Desk policy: `python -m hintsd_jax.tools.desk_policy --config=configs/desk_warmup.py
--out=assets/desk-policy`.
"""
