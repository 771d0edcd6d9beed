"""PTX text to programs: parsing, translation to Python, and what is known of a kernel before it runs."""
