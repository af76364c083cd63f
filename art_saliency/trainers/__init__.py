"""The methods as ART trainers, and runs on disk. Of the library, this package alone imports ART."""
