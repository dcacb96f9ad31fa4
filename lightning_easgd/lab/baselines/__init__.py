"""Methods that elastic averaging is compared with."""
