#!lua flags=allow-oom
-- A batch, and some of its items or results, as many as fit.
-- ARGV  1 'items' or 'results'  2 the first  3 most of them  4 most bytes, but for one
-- Reply {batch, how many there are, those found}, or nil if there is no such batch
--@include batches
if call('EXISTS', B) == 0 then return false end
local key, first, most, room = B .. ':' .. ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local found = {}
local AT_ONCE = 16 -- an entry may be megabytes
while #found < most and room > 0 do
  local from = first + #found
  local page = call('LRANGE', key, from, from + math.min(AT_ONCE, most - #found) - 1)
  if #page == 0 then break end
  for _, entry in ipairs(page) do
    if #found > 0 and #entry > room then return { describe(), call('LLEN', key), found } end
    room = room - #entry
    found[#found + 1] = entry
  end
end
return { describe(), call('LLEN', key), found }
