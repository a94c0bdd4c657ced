"""Timer, statistics, telemetry, kernel bench, throughput bench."""
