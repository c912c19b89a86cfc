"""An attention backend for attnbench. attnbench finds it in my_flash.backend, by the entry point in pyproject.toml."""
