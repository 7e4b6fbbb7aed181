"""`mmr1-ds report`: one HTML file, and pictures, of what runs left in their directories. Nothing heavy is imported."""
