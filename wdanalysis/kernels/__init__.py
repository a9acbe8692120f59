"""The three sums of a vector's change, fast.

For one vector w₀ of the base and the same vector w of the tuned matrix, with d = w − w₀,

    a = Σ w₀²      p = Σ w₀·d      q = Σ d²

give both magnitudes and the angle between the two without cancellation (`sums.py`). `cpu.py` takes them of two stored
matrices in one pass, `lowrank.py` of a matrix and an adapter's factors without merging them.
"""
