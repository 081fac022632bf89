#!lua flags=allow-oom
-- Gives back what reservations did not use, in every quota that they were counted in. Once each: the reservation goes.
-- KEYS  1 {t:<tenant>}:quota
-- ARGV  pairs of reservation id and tokens used; -1: nothing was begun, and the request itself is given back too
-- Reply: number of reservations settled.
local call = redis.call
local P = string.sub(KEYS[1], 1, -6)
local WINDOW_MS = 60000
local time = call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local settled = 0

-- What has drained was withheld from nobody any more, and is not given back. What was given back of this rate since the
-- reservation may have moved its share forward, and counts as if it had: too little may come back, never too much.
local function give_back(field, limit, amount, drains_at, given_then)
  if limit == 0 or amount <= 0 then return end
  local stored, given = unpack(call('HMGET', KEYS[1], field, 'g' .. field))
  local moved = tonumber(given or 0) - given_then
  if not stored or moved < 0 then return end -- all of it has drained, and been forgotten
  local ms = math.min(amount * WINDOW_MS / limit, drains_at - moved - now) -- mutant: drained
  if ms <= 0 then return end
  call('HSET', KEYS[1], field, string.format('%.3f', stored - ms), 'g' .. field, string.format('%.3f', (given or 0) + ms))
end

for at = 1, #ARGV, 2 do
  local reservation = P .. 'r:' .. ARGV[at]
  local text = call('GET', reservation)
  if text then
    local words = {}
    for word in string.gmatch(text, '%S+') do words[#words + 1] = word end
    local used = tonumber(ARGV[at + 1])
    local unused = tonumber(words[1]) - math.max(0, used)
    for i = 1, 2 do
      local suffix = i == 1 and '' or ':' .. words[3]
      local first, share = i == 1 and 4 or 7, i == 1 and 10 or 14
      local r_drains, r_given, t_drains, t_given = unpack(words, share, share + 3)
      give_back('t' .. suffix, tonumber(words[first + 1]), unused, tonumber(t_drains), tonumber(t_given))
      if used < 0 then give_back('r' .. suffix, tonumber(words[first]), 1, tonumber(r_drains), tonumber(r_given)) end
      local day_key, field = P .. 'd:' .. words[2], 'tokens' .. suffix
      if tonumber(words[first + 2]) > 0 and call('HEXISTS', day_key, field) == 1 then
        call('HINCRBY', day_key, field, -unused)
      end
    end
    call('DEL', reservation)
    settled = settled + 1
  end
end
return settled
