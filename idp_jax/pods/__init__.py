"""Programs for devices that are not here: compiled by their own compiler, counted, and judged."""
