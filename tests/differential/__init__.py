"""Random designs fitted here and by R: a net for faults that no list of examples foresees."""
