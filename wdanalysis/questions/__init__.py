"""Questions that are asked first: what an adapter's weights say, how two checkpoints differ, what was merged."""
