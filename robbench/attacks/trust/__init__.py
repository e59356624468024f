"""What is checked of a model before and after an attack, and what makes its number suspicious."""
