"""From a base and tuned checkpoints to one row for each matrix: plan, stream, measure."""
