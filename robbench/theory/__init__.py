"""The linear theory of likelihood attacks (paper 002), in closed form: flows that fit a Gaussian."""
