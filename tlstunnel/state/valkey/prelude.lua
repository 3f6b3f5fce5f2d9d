-- Every script begins with this. KEYS[1] is the hash of holders: for each the time of its last heartbeat, negative after
-- it was replaced, and "secret". Times are microseconds of the server's clock.
local STALE = 45000000
local HOLDERS_TTL = 86400000
local TUNNELS_TTL = 14400000

local clock = redis.call("TIME")
local now = clock[1] * 1000000 + clock[2]

local function is_fresh(beat)
  return math.abs(now - math.abs(beat)) <= STALE
end

-- Holders whose heartbeat is missing count for nothing; so do those that nobody knows.
local fresh = {}
local function is_counted(holder)
  if fresh[holder] == nil then
    fresh[holder] = is_fresh(tonumber(redis.call("HGET", KEYS[1], holder) or 0))
  end
  return fresh[holder]
end

-- Whether commands of this holder are still valid. Those of an earlier connection may arrive late.
local function is_current(holder)
  local beat = tonumber(redis.call("HGET", KEYS[1], holder) or 0)
  return beat > 0 and is_fresh(beat)
end

-- The number of open tunnels under a key. Removes the holders that do not count.
local function count_tunnels(key)
  local number, fields = 0, redis.call("HGETALL", key)
  for at = 1, #fields, 2 do
    if is_counted(fields[at]) then
      number = number + tonumber(fields[at + 1])
    else
      redis.call("HDEL", key, fields[at])
    end
  end
  return number
end

local request = cmsgpack.unpack(ARGV[1])
