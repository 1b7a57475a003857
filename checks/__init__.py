"""This repository's own long drivers: kills, soaks, and comparisons with other trainers."""
