"""Plans: guidelines for concurrent tunnels, where each site stands, and the notices about it. Nobody is cut off.

`values` is what the modules share. `guidelines` says what a site's plan is, `standing` where the site stands, `abuse`
and `addresses` whether it is being flooded, `sentences` why, and `notices` whom to write to. None of these does I/O.
`notice_file` and `notice_store` keep notices, `channels` has what they go through (`webhook`, `mail`, with
`templates`), `delivery` delivers them, and `notifier` does all of it. `plot` and `site_plot` draw a site's tunnels.
`assessor` assesses all sites, and `assessments` keeps where they stood last.
"""
