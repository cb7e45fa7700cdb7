"""Many runs that differ in a few settings, what they share made once, and what they allow one to say."""
