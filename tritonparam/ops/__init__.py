"""One file per map: the autograd function, and kernel or closed form by the tensor's device."""
