"""The kernel that turns a range plan into walks: which blocks each tile of rows visits."""
