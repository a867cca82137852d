"""Fair measurement: two sides in turn, disturbances noticed, records kept."""
