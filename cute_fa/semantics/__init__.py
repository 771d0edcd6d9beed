"""What attention means: problems, options, names, errors, the reference. No torch operator, no DSL."""
