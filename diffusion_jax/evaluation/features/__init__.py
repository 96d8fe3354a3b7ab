"""Networks whose features stand for pictures when two sets of them are compared."""
