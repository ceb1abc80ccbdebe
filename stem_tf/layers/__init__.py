"""Building blocks of the models. Shapes: B batch, F fields, D embedding width, T tasks, K experts, H hidden width."""
