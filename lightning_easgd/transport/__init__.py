"""What moves bytes between the workers, who of them lives, and how they find each other; it knows no parameters."""
