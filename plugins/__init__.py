"""attnbench's own backends, one module a plugin. They may import attnbench; attnbench never imports them."""
