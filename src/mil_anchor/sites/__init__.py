"""Where models keep their attention: sites, the registry of known ones, discovery and proof."""
