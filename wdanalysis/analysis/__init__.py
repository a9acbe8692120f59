"""What the metrics table says: tables in, tables out."""
